"""The experiment of the article that this project starts from."""
