"""Data: published formats -> examples -> token ids and labels.

An example is a row of a ``datasets.Dataset`` with an ``id`` (see ``formats.to_examples``), and either ``messages`` (a
list of ``{"role", "content"}``), or ``prompt`` and ``completion`` (both text, or both lists of messages), or one text
column; and, where the answer can be checked, ``answer`` and ``answer_type`` (see ``answers.check_answer``); and
``cluster_id`` where the rows have it: rows of one label depend on each other.
"""
