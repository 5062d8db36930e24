#!/usr/bin/env bash
# arm64_root.sh FOLDER [VERSION]: Python, numpy and onnxruntime for 64-bit ARM in FOLDER, for test_arm64.py (ARM64_ROOT).
# Needs Debian's apt-get and pip; installs nothing on this machine.
set -euo pipefail
mkdir -p "$1"; folder=$(cd "$1" && pwd); version=${2:-1.25.0}
mkdir -p "$folder"/{state,lists/partial,cache/archives/partial,debs,wheels,site}
touch "$folder/status"
cat > "$folder/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$folder/state";
Dir::State::lists "$folder/lists";
Dir::State::status "$folder/status";
Dir::Cache "$folder/cache";
END
export APT_CONFIG="$folder/apt.conf"
apt-get -qq update
python=$(apt-cache depends python3-minimal | sed -n 's/.*Depends: \(python3\.[0-9]*\)-minimal/\1/p' | head -1)
(cd "$folder/debs" && apt-get -qq download "$python-minimal" "lib$python-minimal" "lib$python-stdlib" libc6 libgcc-s1 \
  libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5)
for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder"; done
unset APT_CONFIG
python3 -m pip download -q --no-deps --only-binary :all: --platform manylinux2014_aarch64 \
  --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 --python-version "${python#python}" \
  --implementation cp -d "$folder/wheels" "onnxruntime==$version" "numpy==2.2.6"
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/site"; done
ln -sf "$python" "$folder/usr/bin/python3"
