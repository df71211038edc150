"""Weight files: Keras's, ImageNet's, and those of other frameworks with their names and conventions."""
