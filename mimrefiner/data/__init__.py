"""Images: data sets, splits and views."""
