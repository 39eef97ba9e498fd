"""Reports and model cards of quantised files: measurements, plots and Markdown."""
