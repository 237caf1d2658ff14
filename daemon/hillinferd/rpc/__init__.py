"""The transports: the attach socket and gRPC."""
