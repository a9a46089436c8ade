"""Detection and segmentation data: reading pictures and annotations, transforms, metrics, inference, drawing."""
