"""SavedModels that take images of any size, and detection with them."""
