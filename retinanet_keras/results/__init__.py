"""What comes of detections: COCO's numbers, pictures and curves."""
