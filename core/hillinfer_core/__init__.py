"""What client and daemon share: wire stubs, arena, layout, reference arithmetic and native kernel.

Depends on numpy and grpc only, and never on :mod:`hillinfer` or :mod:`hillinferd`.
"""
