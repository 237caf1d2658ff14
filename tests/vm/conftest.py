"""The tests in guest/ need a kernel of their own: `make test-vm` boots one and sets HILLINFER_VM there."""

import os

collect_ignore = [] if os.environ.get("HILLINFER_VM") else ["guest"]
