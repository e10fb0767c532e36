import sys

import torch

from benchmarks.alignment.experiment import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
