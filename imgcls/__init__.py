"""Image classifiers, from packed images to a page of answers. Knows nothing of Ray."""
