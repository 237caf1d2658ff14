"""The SmartSSD: rows on its NVMe drive, evaluation in its FPGA, through pyxrt (docs/smartssd.md).

Nothing here has run on hardware: it is built to the vendor's documents and tested on a fake pyxrt.
"""
