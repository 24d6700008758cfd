"""Text in, text out: chats, and the text of a growing answer."""
