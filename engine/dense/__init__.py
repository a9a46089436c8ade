"""Detection and segmentation: data, transforms, metrics, inference and pictures."""
