"""The HTTP endpoint: OpenAI's API over a `Client`, for the programs people already have."""
