import sys

from benchmarks.harness.suite import main

if __name__ == "__main__":
    sys.exit(main())
