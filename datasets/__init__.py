"""Data: folders or packed mosaics of images -> one uint8 tensor, and augmentation of batches on the device."""
