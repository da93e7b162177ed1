// Bellhop's service worker: shows push messages, opens what they are about, takes away what was read elsewhere.
"use strict";

addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));

function inside(url) {
	// A message may lead only to this site.
	const target = new URL(url ?? "/", location.origin);
	return target.origin === location.origin ? target.href : location.origin + "/";
}

let last = Promise.resolve();

function inTurn(act) {
	// Chromium forgets a notification when their list is read in the very moment it is shown.
	return (last = last.then(act, act));
}

function pushed({ data }) {
	try {
		return data.json();
	} catch {
		return {}; // a push must show something, even one that nobody can read
	}
}

async function show(message) {
	await registration.showNotification(message.title ?? "Bellhop", {
		tag: message.tag ?? message.id,
		renotify: Boolean(message.tag), // a page's own alert has none: it is silent after the push of the same thing
		requireInteraction: message.severity === "critical",
		data: { id: message.id, url: inside(message.url) },
	});
}

async function closeRead() {
	for (const shown of await inTurn(() => registration.getNotifications())) {
		const id = shown.data?.id;
		const response = id && (await fetch("/api/notifications/" + encodeURIComponent(id)).catch(() => null));
		if (!response?.ok) continue;
		const { notification } = await response.json();
		if (notification.read_at || notification.archived_at) shown.close();
	}
}

async function open(url) {
	const pages = await clients.matchAll({ type: "window", includeUncontrolled: true });
	const page = pages.find((one) => one.url === url);
	return page ? page.focus() : clients.openWindow(url);
}

addEventListener("push", (event) => event.waitUntil(inTurn(() => show(pushed(event))).then(closeRead)));
addEventListener("message", (event) =>
	event.waitUntil(event.data === "check" ? closeRead() : inTurn(() => show(event.data))));
addEventListener("notificationclick", (event) => {
	event.notification.close();
	event.waitUntil(open(inside(event.notification.data?.url)));
});
