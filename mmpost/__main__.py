"""``python -m mmpost`` and ``torchrun -m mmpost`` are the ``mmpost`` command."""

from mmpost.cli import main

if __name__ == "__main__":
    main()
