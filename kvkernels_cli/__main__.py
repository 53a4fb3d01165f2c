"""``python -m kvkernels_cli``."""

from kvkernels_cli.scripts import kvkernels

if __name__ == "__main__":
    kvkernels()
