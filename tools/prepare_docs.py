"""Makes _proc, the pages that Quarto renders. nbdev's own command would fetch Quarto first."""

from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs


def main():
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    print(f"prepared {proc_nbs(force=True)}")


# nbdev works in processes that import this file again.
if __name__ == "__main__":
    main()
