"""Print the folder of ap_int.h and hls_stream.h in an installed hls4ml wheel, without importing hls4ml."""

import sys
from importlib.metadata import PackageNotFoundError, files


def main() -> int:
    """Print the folder; return 1, with a line on what to install, where there is none."""
    try:
        found = [file for file in files("hls4ml") or [] if file.name == "ap_int.h"]
    except PackageNotFoundError:
        found = []
    if not found:
        print("hls4ml is not installed (pip install --no-deps hls4ml); or set AP_TYPES", file=sys.stderr)
        return 1
    print(found[0].locate().parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
