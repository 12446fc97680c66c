"""The HTTP server: OpenAI's routes and /generate over the decoding engine. `python -m dsv3_jax.serving`.

A request passes, in this order: `protocol` (bytes, timeouts of the connection), `gate` (limits before any work, request
id, API key), `app` (routes), `schemas` and `service` (what is asked), `generation` (its sequences while they grow),
`worker` (the thread that owns the engine). Text: `chat` (conversations as ids), `text` (ids as deltas), `filter`.
"""
