"""`python -m docs.reference`: writes the generated pages of docs/."""

from __future__ import annotations

from pathlib import Path

from docs.reference.protos import grpc_page
from docs.reference.rest import rest_page
from docs.reference.settings import settings_page

DOCS = Path(__file__).parents[1]
PAGES = {"configuration.md": settings_page, "api-rest.md": rest_page, "api-grpc.md": grpc_page}


def main() -> None:
    for name, make_page in PAGES.items():
        (DOCS / name).write_text(make_page(), encoding="utf-8")
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
