"""The API as an ASGI application: `uvicorn tests.asgi:application`."""

from a2wsgi import WSGIMiddleware

import wsgi

application = WSGIMiddleware(wsgi.application)  # type: ignore[arg-type]
