"""``python -m hillinferd`` is ``hillinferd``."""

from .main import main

if __name__ == "__main__":
    main()
