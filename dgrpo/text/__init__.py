"""Text to token ids, and rows of text that cannot be used."""

from dgrpo.text.encode import count_tokens, encode_chat, encode_text
from dgrpo.text.problems import BadRow, Report

__all__ = ["BadRow", "Report", "count_tokens", "encode_chat", "encode_text"]
