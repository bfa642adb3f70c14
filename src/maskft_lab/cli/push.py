"""``maskft push``: an adapter, or a model that one was merged into, on the hub."""

from __future__ import annotations


def add_arguments(parser) -> None:
    """Options of ``maskft push``."""
    parser.add_argument("folder", metavar="DIR", help="adapter folder, or a folder that maskft merge has written")
    parser.add_argument("repository", metavar="NAME", help="where to, e.g. your-name/your-mask; made if not there")
    parser.add_argument("--base", metavar="NAME", help="the base's name on the hub; default: what the adapter says")
    parser.add_argument("--private", action="store_true", help="make a private repository")


def run(args) -> None:
    """Check, and upload in one commit."""
    from maskft.adapter.push import push
    from maskft_base.runtime import silence

    silence()
    print(push(args.folder, args.repository, base=args.base, private=args.private))
