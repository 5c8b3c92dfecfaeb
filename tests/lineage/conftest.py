"""The fixtures of the small DVC project."""

from tests.mini_project import finished as finished
from tests.mini_project import project as project
