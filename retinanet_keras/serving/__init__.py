"""SavedModels that take images as they are, and detection with them."""
