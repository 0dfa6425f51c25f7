"""A server of one model. A request goes from the socket to the reply through these files, in this order:

    http/connection.py      bytes become an HTTP request, within limits of time and number
    http/access.py          host, origin, key and body are checked; the body is read whole
    routes.py               the path is looked up; from here on a request is JSON of OpenAI's API
    openai/requests.py      the JSON, read strictly by strict_json.py, becomes a ChatRequest or a CompletionRequest
    openai/conversion.py    that becomes a GenerationRequest: the ids of a prompt that fits, sampling, stops
    http/streaming.py       StreamBridge queues a Reply for it, and waits for its deltas on the event loop
    engine.py               one thread decodes all replies together, and pushes ids into them
    reply.py                ids become text there, from which the bridge takes deltas
    openai/responses.py     deltas become chunks, or the whole reply one object
    http/streaming.py       these are sent, as server-sent events or as one body

Where two models are compared (comparison/service.py), comparison/routes.py takes the place of routes.py.
comparison/pairs.py makes a pair of a request: two bridges to two engines, which comparison/engines.py puts together,
and in the end a vote, which comparison/vote_file.py stores.

errors.py has the ApiError that may end a request anywhere; http/refusal.py answers it. service.py puts all this
together for one model, and http/server.py runs it until it is told to stop. http/ knows no shape of OpenAI's and
openai/ no HTTP: routes.py alone knows both.
"""
