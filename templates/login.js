// Signing in: the token waits behind the # of the link, where no server and no log ever sees it.
const form = $("#login");
const says = $("#login-says");

function wish() {
	// Where the reader wanted to go. Remembered for an hour, because the link they then ask for cannot know it.
	const wanted = new URLSearchParams(location.search).get("next");
	if (wanted) localStorage.next = JSON.stringify({ path: wanted, until: Date.now() + 36e5 });
	const { path, until } = JSON.parse(localStorage.next ?? "{}");
	return until > Date.now() ? path : "/";
}

function samePlace(path) {
	// Only a path of this site: never another origin, never the sign-in page again.
	if (!/^\/(?!\/)[^\\\p{Cc}]*$/u.test(path)) return "/";
	const url = new URL(path, location.origin);
	const fine = url.origin === location.origin && url.pathname !== "/login";
	return fine ? url.pathname + url.search + url.hash : "/";
}

async function enter(text) {
	const token = text.trim().split("#token=").pop();
	says.textContent = word("login.js.busy");
	try {
		const response = await fetch("/login", {
			method: "POST",
			headers: { "Content-Type": "application/json" },
			body: JSON.stringify({ token }),
		});
		if (!response.ok) return refuse(response.status < 500 ? "login.js.bad" : "login.js.away");
	} catch {
		return refuse("login.js.away");
	}
	const path = samePlace(wish());
	delete localStorage.next;
	location.replace(path);
}

function refuse(key) {
	says.textContent = word(key);
	$("#link").focus();
}

function arrive() {
	// Also when the link is opened in a tab that already shows this page.
	const { hash } = location;
	if (!hash.startsWith("#token=")) return;
	history.replaceState(null, "", location.pathname + location.search);
	enter(decodeURIComponent(hash));
}

wish();
form.onsubmit = (event) => {
	event.preventDefault();
	enter($("#link").value);
};
addEventListener("hashchange", arrive);
arrive();
