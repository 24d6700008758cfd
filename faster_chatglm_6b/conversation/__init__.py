"""Text in, text out: chats, prompts, templates and the text of a growing answer."""
