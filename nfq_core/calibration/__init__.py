"""What a model's layers are fed: collected, stored, merged, and what it says about their sensitivity."""
