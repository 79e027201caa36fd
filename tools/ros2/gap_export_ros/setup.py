"""The package as colcon builds it; gap-export itself is installed with pip."""

from setuptools import setup

NAME = "gap_export_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/ground.launch.py"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="gap-export",
    maintainer_email="gap-export@example.com",
    description="Finds what expressions name in the images of a topic.",
    license="Apache-2.0",
    entry_points={"console_scripts": [f"ground = {NAME}.ground_node:main"]},
)
