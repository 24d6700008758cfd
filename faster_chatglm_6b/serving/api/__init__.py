"""The HTTP interface: OpenAI's, THUDM's, and what operators of a server look at. Needs the extra ``serve``."""
