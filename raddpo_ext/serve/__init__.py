"""The retriever as an HTTP service: ``python -m raddpo_ext serve`` (needs ``pip install 'raddpo_ext[serve]'``).

One front process (``server``, ``app``, ``batcher``, ``pool``) takes the requests and hands them in batches to worker
processes (``worker``), each with the model and the store's newest catalogue. They talk in the words of ``protocol``.
"""
