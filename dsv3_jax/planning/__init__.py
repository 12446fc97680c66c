"""What a run needs, told before a device is rented: `python train.py --config C --dry-run`."""
