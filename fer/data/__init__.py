"""Data sets, splits, the store of decoded images, loaders and augmentation."""
