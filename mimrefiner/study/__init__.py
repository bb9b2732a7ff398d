"""The study: presets, trained models, claims, figures, and the numbers of the paper."""
