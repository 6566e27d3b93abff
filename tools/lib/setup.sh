# shellcheck shell=bash
# Set-up shared by tools/ringnet and tools/test: system packages, virtual environment, C build.
#
# Everything lands in the checkout (.venv/, build/, shm/_dataplane*.so) except system packages, which are
# asked for by command, so that a program the machine already has is never installed again. A stamp (hash of
# what the result depends on) makes the second run a matter of milliseconds. All talk goes to stderr:
# stdout belongs to the program that is run in the end.

say() { printf '==> %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# step TEXT COMMAND...: run it with its output indented below TEXT; say how long it took.
step() {
	local text=$1 begin=$SECONDS
	shift
	say "$text"
	# 9: the set-up lock must not be inherited by anything that may live on.
	if ! "$@" 9>&- 2>&1 </dev/null | sed -u 's/^/    /' >&2; then # pipefail: the command's own status
		die "failed: $text (the lines above say why)"
	fi
	say "$text: done, $((SECONDS - begin)) s"
}

# as_root COMMAND...: directly, or by sudo without a password prompt; status 97 if neither is possible.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
		sudo -n "$@"
	else
		return 97
	fi
}

apt_install() {
	local env=(env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1)
	local opts=(-q -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 -o APT::Update::Error-Mode=any)
	as_root "${env[@]}" apt-get -q "${opts[@]}" update | grep -Ev '^(Hit|Ign|Reading)' || true
	as_root "${env[@]}" apt-get "${opts[@]}" install --no-install-recommends "$@" |
		grep -E '^(Setting up|The following NEW|[0-9]+ upgraded|Need to get|E:|W:)'
}

# packages_for COMMAND:PACKAGE...: install the packages whose command is not there.
packages_for() {
	local pair missing=() policy=/usr/sbin/policy-rc.d guarded=
	PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # a plain user's does not reach ip, nginx, the DHCP clients
	for pair in "$@"; do
		command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null ||
		die "missing: ${missing[*]} (Debian package names); no apt-get here, install what provides them and run this again"
	as_root true || die "missing packages; run: sudo apt-get install --no-install-recommends ${missing[*]}"
	# A package like nginx-light would start its service: forbid that for the time of this install only. If the
	# machine has a policy of its own it stays, and is asked instead.
	if [ ! -e $policy ]; then
		guarded=yes
		# shellcheck disable=SC2064 # now, not at the trap
		trap "as_root rm -f $policy" EXIT
		printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
		as_root chmod 755 $policy
	fi
	step "installing ${missing[*]} (apt-get)" apt_install "${missing[@]}"
	if [ -n "$guarded" ]; then
		as_root rm -f $policy
		trap - EXIT
	fi
	# Nor at the next boot: we want the program, not the service. Only where this run brought it.
	case " ${missing[*]} " in *" nginx-light "*)
		! command -v systemctl >/dev/null || as_root systemctl disable nginx.service >/dev/null 2>&1 || true ;;
	esac
}

# Python: 3.11 or newer that can make a virtual environment and has its C headers. The system's comes first:
# an interpreter below a home directory cannot be run by other users of this checkout.
python_ok() {
	"$1" - 2>/dev/null <<-'PY'
		import ensurepip, pathlib, sys, sysconfig, venv
		sys.exit(not (sys.version_info >= (3, 11) and (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()))
	PY
}
find_python() {
	local candidate
	for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
		candidate=$(command -v "$candidate") || continue
		if python_ok "$candidate"; then
			printf '%s\n' "$candidate"
			return 0
		fi
	done
	return 1
}

ensure_python() {
	PYTHON=$(find_python) && return 0
	packages_for no-such-command:python3-venv no-such-command:python3-dev
	PYTHON=$(find_python) || die "no Python 3.11 or newer with venv and headers; install one and run this again"
}

install_python_packages() { # set -e is off in here (we are part of a condition): every step says what a failure means
	local list
	[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || return
	list=$(.venv/bin/python - "$@" <<-'PY'
		import sys, tomllib
		project = tomllib.load(open("pyproject.toml", "rb"))
		wanted = project["project"]["dependencies"]
		for extra in sys.argv[1:]:
		    wanted += project["project"]["optional-dependencies"][extra]
		print("\n".join(dict.fromkeys(wanted)))
	PY
	) || return
	printf '%s\n' "$list" >.venv/requirements.txt
	.venv/bin/python -m pip --disable-pip-version-check install --progress-bar off -r .venv/requirements.txt |
		sed -u '/^Requirement already satisfied/d' || return
	# The checkout is the package: no copy that could be older than the source.
	.venv/bin/python - <<-'PY'
		import os, pathlib, sysconfig
		pathlib.Path(sysconfig.get_path("purelib"), "ringnet-checkout.pth").write_text(os.getcwd() + "\n")
		command = pathlib.Path(sysconfig.get_path("scripts"), "ringnet")
		command.write_text(f'#!/bin/sh\nexec "{os.getcwd()}/.venv/bin/python" -P -m pipeline "$@"\n')
		command.chmod(0o755)
	PY
}

# What the result depends on, read by `prepare` before and after waiting for the lock.
wanted_stamps() {
	want_packages=$({ cat pyproject.toml tools/lib/setup.sh; pwd; } | sha256sum)
	want_build=$(cat shm/build_dataplane.py csrc/*.[ch] csrc/*.def | sha256sum)
}
stamp_is() { [ -f ".venv/$1" ] && [ "$(<".venv/$1")" = "$2" ]; }
packages_ready() { [ -x .venv/bin/python ] && stamp_is "stamp-$1" "$want_packages"; }
built() { compgen -G 'shm/_dataplane*.so' >/dev/null && stamp_is stamp-build "$want_build"; }

# prepare REPO run|test: bring the checkout to the state in which `python -m pipeline` (and the tests) work.
prepare() {
	local repo=$1 what=$2 extras=()
	cd "$repo" || exit 1
	[ "$what" = run ] || extras=("$what")
	wanted_stamps
	if packages_ready "$what" && built; then
		return 0
	fi
	if [ ! -w . ] || { [ -d .venv ] && [ ! -w .venv ]; }; then
		[ "$what" = run ] || die "$repo is not writable by you; copy the checkout, or run this as its owner"
		{ [ -x .venv/bin/python ] && compgen -G 'shm/_dataplane*.so' >/dev/null; } ||
			die "$repo is not writable by you and not built; run tools/ringnet once as its owner, or copy the checkout"
		say "note: $repo is not yours and was built from other sources; running it as it is"
		return 0
	fi
	mkdir -p build
	exec 9>build/setup.lock
	if ! flock -n 9; then
		say "another set-up is at work in this checkout; waiting for it"
		flock 9
		wanted_stamps
	fi
	packages_for gcc:gcc
	[ -e /usr/include/stdio.h ] || packages_for no-such-command:libc6-dev
	if ! packages_ready "$what"; then
		if [ -d .venv ] && ! .venv/bin/python -c 'import pip' 2>/dev/null; then
			rm -rf .venv # half made, or its interpreter is gone
		fi
		[ -d .venv ] || ensure_python
		step "Python packages into .venv/${PYTHON:+, a virtual environment of $PYTHON}" \
			install_python_packages "${extras[@]}"
		printf '%s\n' "$want_packages" | tee .venv/stamp-run >".venv/stamp-$what"
	fi
	if ! built; then
		step "compiling csrc/ with -Wall -Wextra -Werror" .venv/bin/python -m shm.build_dataplane
		printf '%s\n' "$want_build" >.venv/stamp-build
	fi
	exec 9>&-
}
