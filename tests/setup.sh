#!/usr/bin/env bash
# Installs what the tests need on Debian: see `usage` below.
set -euo pipefail
umask 022

usage() {
    cat <<'USAGE'
usage: tests/setup.sh [--demo]

Installs what the tests need on Debian 12 or 13, besides Rust. A second run finds everything in place and is done at once.

  Debian packages   a C compiler, a JDK, nginx, logrotate, Jersey, Python, SQLite, ... No service is started or left enabled.
                    Needs root or sudo, and only when a package is missing.
  Hadoop 2.7.4      the jars of its NameNode and DataNode, from the source archive pyspark 3.0.2 (205 MB are loaded, 40 MB kept).
                    With HADOOP_HOME set, that Hadoop is used instead and nothing is loaded.
  Spark 3.5.1       PySpark in a virtual environment of its own.
  MapReduce         the Java job in tests/readers, compiled.

  --demo            installs only what building and running the demo needs.

The last three are kept in TRIBUTARY_CACHE (default: XDG_CACHE_HOME/tributary, that is ~/.cache/tributary). Delete that folder to
start afresh.
USAGE
}

demo=false
case "${1:-}" in
    '') ;;
    --demo) demo=true ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 64 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${TRIBUTARY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tributary}
making=$cache/making
# Debian's own: a `python3` that comes first in PATH may lack the venv module that the package python3-venv adds.
python=/usr/bin/python3

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*" && exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "must become root for: $*. Run tests/setup.sh as root once, or install sudo"
    fi
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Hadoop 2.7 and Spark 3.5 run on 17 and 21; from 24 on, the JDK lacks the security manager that Hadoop asks for.
jdk_home() {
    local home version
    for home in "${JAVA_HOME:-}" /usr/lib/jvm/*-17-* /usr/lib/jvm/*-21-*; do
        if [ ! -x "$home/bin/javac" ] || [ ! -r "$home/release" ]; then continue; fi
        version=$(sed -n 's/^JAVA_VERSION="\([0-9]*\).*/\1/p' "$home/release")
        if [ "${version:-0}" -ge 17 ] && [ "$version" -le 23 ]; then
            readlink -f "$home"
            return
        fi
    done
    return 1
}

jdk_package() {
    local name
    for name in openjdk-17-jdk-headless openjdk-21-jdk-headless; do
        if [ -n "$(apt-cache madison "$name" 2>/dev/null)" ]; then
            echo "$name"
            return
        fi
    done
    echo default-jdk-headless
}

policy=/usr/sbin/policy-rc.d
policy_saved=$policy.tributary-saved
policy_mark='placed by tests/setup.sh of Tributary while it installs packages'

# Debian starts a service as soon as its package is installed, unless this file forbids it.
forbid_services() {
    if [ -e "$policy" ]; then as_root mv "$policy" "$policy_saved"; fi
    printf '#!/bin/sh\n# %s\nexit 101\n' "$policy_mark" | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
}

allow_services() {
    if grep -qs "$policy_mark" "$policy"; then as_root rm -f "$policy"; fi
    if [ -e "$policy_saved" ]; then as_root mv "$policy_saved" "$policy"; fi
}

install_packages() {
    local wanted=(gcc libc6-dev make) missing=() name need_jdk=false new_nginx=false
    if ! $demo; then
        wanted+=(ca-certificates curl gzip logrotate nginx procps python3 python3-venv sqlite3 util-linux zstd)
        if [ -z "${HADOOP_HOME:-}" ]; then
            wanted+=(libjersey1-core-java libjersey1-server-java libjersey1-servlet-java)
        fi
        jdk_home >/dev/null || need_jdk=true
    fi
    for name in "${wanted[@]}"; do
        installed "$name" || missing+=("$name")
    done
    if [ ${#missing[@]} = 0 ] && ! $need_jdk; then return; fi

    command -v apt-get >/dev/null || die "knows only Debian's apt-get. Install these by hand: ${missing[*]}, a JDK 17 or 21"
    say "apt-get update"
    as_root apt-get update -qq
    if $need_jdk; then missing+=("$(jdk_package)"); fi
    say "apt-get install ${missing[*]}"
    if [[ " ${missing[*]} " == *" nginx "* ]]; then new_nginx=true; fi
    trap allow_services EXIT
    forbid_services
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    allow_services
    trap - EXIT
    # The tests start an nginx of their own; the system's would come up at the next boot.
    if $new_nginx; then as_root update-rc.d nginx disable >/dev/null 2>&1 || true; fi
}

# Each part is made in $making and then renamed, so a folder under its final name is complete.
begin() {
    say "$1"
    rm -rf "$making"
    mkdir -p "$making"
}

# The name, the version and the checksum of a package are pip's own requirement syntax. Its cache would hold each archive twice.
pip() { "$making/venv/bin/pip" --quiet --no-cache-dir --disable-pip-version-check "$@"; }

hadoop_jars='^(activation-1|apacheds|api-(asn1|util)|avro-1|commons-(beanutils|cli|codec|collections|compress|configuration|dbcp|digester|httpclient|io|lang|lang3|logging|math3|net|pool)-|curator|gson|guava-14|hadoop-|htrace-core-3|httpclient|httpcore|jackson-(core|mapper)-asl|javax.servlet-api|jaxb-api|jetty-6|jetty-sslengine|jetty-util-6|leveldbjni|log4j-1.2|netty-all|protobuf-java|slf4j-api|slf4j-log4j12|xercesImpl|xml-apis|xmlenc|zookeeper).*\.jar$'

make_hadoop() {
    local sdist=$making/pyspark-3.0.2.tar.gz root=$making/hadoop app
    begin "Hadoop 2.7.4: loading its jars (205 MB)"
    "$python" -m venv "$making/venv"
    echo 'pyspark==3.0.2 --hash=sha256:d4f2ced43394ad773f7b516a4bbcb5821a940462a17b1a25f175c83771b62ebc' >"$making/requirements"
    # For an archive of sources pip asks the package for its name; that is all that is run of it.
    pip download --no-deps --no-binary pyspark --require-hashes -r "$making/requirements" -d "$making"
    mkdir -p "$root/lib" "$making/unpacked"
    tar -xzf "$sdist" -C "$making/unpacked" --strip-components=3 --wildcards '*/deps/jars/*.jar'
    find "$making/unpacked" -name '*.jar' -printf '%f\n' | grep -E "$hadoop_jars" |
        while read -r app; do mv "$making/unpacked/$app" "$root/lib/"; done
    for app in jersey1-core jersey1-server jersey1-servlet jsr311-api; do
        cp -L "/usr/share/java/$app.jar" "$root/lib/"
    done
    # The daemons refuse to start without the folders of their web pages. The archive has none, and the tests need no pages.
    for app in hdfs datanode secondary journal; do
        mkdir -p "$root/web/webapps/$app/WEB-INF"
        echo '<web-app version="2.4"/>' >"$root/web/webapps/$app/WEB-INF/web.xml"
    done
    mkdir -p "$root/web/webapps/static" "$root/web/webapps/logs"
    mv "$root" "$hadoop"
    rm -rf "$making"
}

make_spark() {
    begin "Spark 3.5.1: installing PySpark (317 MB, about two minutes)"
    "$python" -m venv "$making/venv"
    cat >"$making/requirements" <<'HASHES'
py4j==0.10.9.7 --hash=sha256:85defdfd2b2376eb3abf5ca6474b51ab7e0de341c75a02f46dc9b5976f5a5c1b
pyspark==3.5.1 --hash=sha256:dd6569e547365eadc4f887bf57f153e4d582a68c4b490de475d55b9981664910
HASHES
    pip install --no-deps --no-compile --use-pep517 --require-hashes -r "$making/requirements"
    # Only bin/python is used of it, and that works wherever the folder lies.
    mv "$making/venv" "$spark"
    rm -rf "$making"
}

make_mapreduce() {
    begin "MapReduce: compiling tests/readers/LinesJob.java"
    mkdir "$making/mapreduce"
    cp "$here/readers/LinesJob.java" "$making/mapreduce/"
    "$java_home/bin/javac" -nowarn -proc:none -cp "$hadoop_classpath" -d "$making/mapreduce" "$making/mapreduce/LinesJob.java"
    rm -rf "$mapreduce"
    mv "$making/mapreduce" "$mapreduce"
    rm -rf "$making"
}

# A run that was killed may have left its own behind.
allow_services
install_packages
if $demo; then
    say "ready for the demo"
    exit 0
fi

case $cache in
    /*) ;;
    *) die "the cache folder $cache is not an absolute path; set TRIBUTARY_CACHE to one" ;;
esac
mkdir -p "$cache"
exec 9>"$cache/lock"
flock -n 9 || { say "waits for another setup that uses $cache" && flock 9; }

java_home=$(jdk_home) || die "found no JDK 17 to 23 under /usr/lib/jvm; set JAVA_HOME"
if [ -n "${HADOOP_HOME:-}" ]; then
    share=$HADOOP_HOME/share/hadoop
    [ -d "$share/hdfs" ] || die "HADOOP_HOME=$HADOOP_HOME has no share/hadoop/hdfs. Set it to an unpacked Hadoop, or unset it"
    hadoop_classpath=$share/hdfs
    for part in common hdfs mapreduce yarn; do
        hadoop_classpath+=":$share/$part/*:$share/$part/lib/*"
    done
else
    hadoop=$cache/hadoop-2.7.4
    [ -d "$hadoop" ] || make_hadoop
    hadoop_classpath="$hadoop/web:$hadoop/lib/*"
fi
spark=$cache/spark-3.5.1-$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
[ -d "$spark" ] || make_spark
mapreduce=$cache/mapreduce
cmp -s "$here/readers/LinesJob.java" "$mapreduce/LinesJob.java" || make_mapreduce

# What the tests read. Written last, so that it names only what is there.
cat >"$cache/parts.new" <<EOP
hadoop_home=${HADOOP_HOME:-}
java_home=$java_home
hadoop_classpath=$hadoop_classpath
spark_python=$spark/bin/python
mapreduce_classes=$mapreduce
EOP
mv "$cache/parts.new" "$cache/parts"
say "ready: $cache"
