"""What a report and a model card say of quantised files: measured, drawn, written."""
