"""`torchrun --nproc-per-node 8 -m sightline.train RECIPE ...` is `sightline train` on several processes."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
