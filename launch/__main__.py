"""`captioning NAME ...`, or `python -m launch NAME ...`."""

from launch.cli.front import main

if __name__ == "__main__":
    main()
