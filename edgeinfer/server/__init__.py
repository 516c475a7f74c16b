"""The HTTP endpoint: OpenAI's API over a `Client`, for the programs people already have.

It answers strangers: every module here takes what it reads for hostile.
"""
