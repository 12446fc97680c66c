"""HTTP server: OpenAI-compatible routes over the engine; text, chat formats, parsers and content filters."""
