"""The server: follows a registered model or a file, and answers OpenAI's requests with it."""
