"""The local HTTP endpoint. It answers strangers: every module here takes what it reads for hostile."""
