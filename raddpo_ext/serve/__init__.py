"""The retriever as an HTTP service: ``python -m raddpo_ext serve`` (needs ``pip install 'raddpo_ext[serve]'``).

A front process (``server``, ``app``, ``batcher``, ``pool``) accepts requests and passes them in batches to worker
processes (``worker``), each with the model and the store's newest catalogue. ``protocol`` has their messages.
"""
