"""The service's request body: any bytes give a query or an error of the client's, in words that JSON can carry."""

from __future__ import annotations

import json

from raddpo_ext.serve.body import Body
from raddpo_ext.serve.protocol import Limits, Query, ServiceError

LIMITS = Limits(vocab_size=100, longest_prompt=8)


def run(data: bytes) -> None:
    refused = None
    try:
        query = Body.parse(data).query(LIMITS, 20)
    except ServiceError as error:
        refused = error
    if refused is not None:
        assert refused.status in (400, 422)
        assert json.loads(refused.body)["error"]["message"] == str(refused)
        str(refused).encode()
        return
    assert isinstance(query, Query)
    assert sum(given is not None for given in (query.input_ids, query.text, query.history)) == 1
    assert 1 <= query.top_k <= 20
