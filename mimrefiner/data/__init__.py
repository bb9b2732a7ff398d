"""Images: data sets with their splits, and the views that training sees."""
