"""The long runs of the study. Their rows lie beside them and are drawn by the notebooks."""
